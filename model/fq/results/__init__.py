"""What is kept of measurements, and what is read out of it."""
