"""Before the work: which model to take."""
