"""The contract of FedPipe: API types, wire types and names. Imports nothing of ours."""
