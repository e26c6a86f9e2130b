"""Settings: types, groups and checks, and the ways they are given: file, environment, flags."""
