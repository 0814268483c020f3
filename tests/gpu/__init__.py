"""What a user with a new GPU node runs first: every way in which this project uses a GPU, tried on a policy of random weights.

    launch/test_gpu.sh                 all that this machine can run: 10 to 15 minutes on one GPU, more with several
    launch/test_gpu.sh --cpu           what needs no GPU, on a small policy: under two minutes
    launch/test_gpu.sh --only NAME     checks whose name contains NAME; --list names all

**The CUDA, NCCL and vLLM parts have never run: there was no GPU at hand when they were written.** A check that fails on the first
GPU may be wrong itself; its log says where. What a CPU can run has run there, and is part of the tests.

A file a subject, a function a check, in the order of `SUBJECTS`; `registry.py` says what a check is, `running.py` runs each in a
process of its own, `__main__.py` prints. Nothing is fetched.
"""

SUBJECTS = ("libraries", "attention", "update", "sharding", "engine", "transfer", "colocated", "servers", "node")
"""Modules of this package, in the order of their checks."""
