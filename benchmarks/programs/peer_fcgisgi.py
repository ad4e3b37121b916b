import asyncio
import sys

from applications import asgi, wsgi
from fcgisgi import run_asgi_server, run_wsgi_server

asyncio.run(run_asgi_server(asgi, sys.argv[1]) if sys.argv[2] == "asgi" else run_wsgi_server(wsgi, sys.argv[1]))
