"""Reading, checking and downloading of real sets, and the embedded samples."""
