"""The FedPipe engine, its Kubernetes operator and the command line."""
