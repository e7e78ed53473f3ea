"""What others are told of a sweep: sweep.json, MLflow, the dry run, curves over fractions."""
