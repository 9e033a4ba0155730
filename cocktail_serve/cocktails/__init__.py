"""Which mixture exists, whose, where, for how long: requests, the registry and its store, jobs and scores."""
