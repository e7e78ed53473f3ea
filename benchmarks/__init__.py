"""What is measured, how, and with what result: `results/` states commit, device, seeds and date."""
