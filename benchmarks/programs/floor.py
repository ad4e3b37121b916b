"The floor for any Python program: take connections, read up to the last record, send an answer made beforehand."
import sys
from socketserver import BaseRequestHandler, UnixStreamServer
from struct import pack

OUT = b"Status: 200 OK\r\nContent-Type: text/plain\r\n\r\nhello a=1&b=two 0\n"
ANSWER = pack("!BBHHBx", 1, 6, 1, len(OUT), 0) + OUT + pack("!BBHHBx", 1, 6, 1, 0, 0) + pack("!BBHHBx8x", 1, 3, 1, 8, 0)
LAST = pack("!BBHHBx", 1, 5, 1, 0, 0)


class Handler(BaseRequestHandler):
    def handle(self):
        receive, send = self.request.recv, self.request.sendall
        data = receive(65536)
        kept = data[10:11] == b"\1"
        while data:
            while not data.endswith(LAST): data = receive(65536)
            send(ANSWER)
            if not kept: return
            data = receive(65536)


class Server(UnixStreamServer): request_queue_size = 1024


Server(sys.argv[1], Handler).serve_forever()
