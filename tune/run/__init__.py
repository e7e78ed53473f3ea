"""What runs a sweep: the driver, Ray Tune's interfaces, one trial, its folder and its data."""
