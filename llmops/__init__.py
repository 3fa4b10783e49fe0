"""What training, the FAQ scenario and evaluation share."""
