"""The scheduler against a made-up machine: the very same decisions and the very same learning, with a clock that a
cost model moves. Here policies are compared on whole traces in minutes.
"""
