"""Shipped experiments, one a file; in a wheel this package is jaxinfra.configs."""
