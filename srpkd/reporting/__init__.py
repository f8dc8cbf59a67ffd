"""A run's page: pictures, tables, curves."""
