"""A contender that measures nothing: for the harness's own test."""

from benchmarks.harness import serve_commands


def fail() -> None:
    raise ValueError("on purpose")


if __name__ == "__main__":
    print("libraries talk on stdout")
    serve_commands({"double": lambda value: 2.0 * value, "fail": fail})
