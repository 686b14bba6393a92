"""Before the work: which model to take, and what its training will need."""
