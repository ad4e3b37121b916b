/* libfcgi, the reference implementation in C. */
#include <fcgiapp.h>

int main(int argc, char **argv) {
    FCGX_Request request;
    char buf[65536];
    FCGX_Init();
    FCGX_InitRequest(&request, FCGX_OpenSocket(argv[argc - 1], 1024), 0);
    while (!FCGX_Accept_r(&request)) {
        long got = 0;
        for (int n; (n = FCGX_GetStr(buf, sizeof buf, request.in)) > 0;) got += n;
        FCGX_FPrintF(request.out, "Content-Type: text/plain\r\n\r\nhello %s %ld\n",
                     FCGX_GetParam("QUERY_STRING", request.envp), got);
        FCGX_Finish_r(&request);
    }
}
