"""`tests.engine.engine_run` on a Ray cluster of its own, with two GPUs that are none."""

import sys
from tempfile import TemporaryDirectory

import ray

from tests.engine import engine_run
from tests.ray.cluster import start_ray

if __name__ == "__main__":
    # Unix sockets lie in there, whose paths must be short.
    with TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        start_ray(folder, num_cpus=2, num_gpus=2)
        engine_run.main(*sys.argv[1:])
        ray.shutdown()
