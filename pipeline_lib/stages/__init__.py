"""One thin entry a stage: read the job, call the library, fill out/."""
