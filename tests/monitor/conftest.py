from tests.serving.conftest import package, start

__all__ = ["package", "start"]
