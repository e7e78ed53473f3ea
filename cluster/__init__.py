"""Running bootvit on a Ray cluster: job submission, and the files that start a cluster.

`submit.submit` is what `bootvit submit` calls; `README.md` beside this file says how to start a cluster on
machines of your own, on Kubernetes and under Slurm.
"""
