"""The FedPipe edge agent: capacity probe and trainer."""
