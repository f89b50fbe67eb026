"""python -m coserve_operator.metrics_api"""

from coserve_operator.metrics_api.server import main

main()
