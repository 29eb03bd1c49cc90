"""What the inputs are and how they meet: bundles, slides, registration, cells, patches."""
