"""Target geometry: closed forms (eq. 9-12) and measured covariances."""
