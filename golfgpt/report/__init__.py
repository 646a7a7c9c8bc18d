"""`golfgpt report`: runs as one HTML page that needs nothing else. `page.render` makes it."""
