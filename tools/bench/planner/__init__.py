"""Runs that others have published, and the fit of the planner's efficiencies to them."""
