"""What several tests use: tiny wheels, and an index that serves them with scripted faults."""
