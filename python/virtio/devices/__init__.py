"""Device types (5), a file each, with the same five names: DEVICE_ID, Feature, Config, <Type>Driver, <Type>Device. `rng` is the pattern."""
