"""Questions to data: is it whole, does it leak, which frame are its boxes in, what was fetched."""
