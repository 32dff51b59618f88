"""The comparison: table, plots, dashboard."""
