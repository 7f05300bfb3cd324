"""A small world with exact ground truth, in which the method's claims can be measured."""
