"""The documents say what the code does."""

from tests import hyperparameters


def test_the_table_of_keys_is_the_schemas():
    page = hyperparameters.PAGE.read_text()
    found = page.split(hyperparameters.BEGIN)[1].split(hyperparameters.END)[0].strip().splitlines()
    assert found == hyperparameters.tables(), "python -m tests.hyperparameters writes the table anew"
