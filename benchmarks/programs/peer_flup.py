import sys

from applications import wsgi
from flup.server.fcgi_single import WSGIServer

WSGIServer(wsgi, bindAddress=sys.argv[1]).run()
