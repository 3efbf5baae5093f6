"""Tables that a run writes."""
import csv


def read_csv(path):
    """The rows of a CSV file as dicts of strings."""
    with open(path, newline='') as file:
        return list(csv.DictReader(file))
