"""What a run leaves to look at: metrics, progress, rollouts, one HTML page; and the doctor."""
