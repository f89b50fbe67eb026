"""What is measured of requests and iterations, and the reserve that follows from it."""
