"""helexa: a self-hosted serving stack for open-weight language models on consumer hardware."""

__version__ = "0.1.0"
