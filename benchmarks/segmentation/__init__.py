"""What nuclei at slide scale cost, and what others do with the same network."""
