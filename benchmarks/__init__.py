"""Measurements that are run by hand and are no part of the package: what zrmq costs, and beside what its peers do."""
