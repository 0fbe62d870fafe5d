"""The capacity probe: what this node can carry, told to people and to the cluster. Imports no torch."""
