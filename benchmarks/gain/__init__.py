"""Where joint training pays: cells of fraction, schedule, recipe and initial values on CIFAR-10 at 32 px."""
