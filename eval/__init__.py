import utils  # noqa: F401 (first: makes our datasets found where another package has that name)
