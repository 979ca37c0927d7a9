"""Target geometry: closed forms (eq. 9-13), measured covariances, and which prediction they favour."""
