"""What every stage may use: seeds, logging, phase times, signals."""
