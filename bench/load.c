// A mock vLLM engine and a load client in one program, made to cost little beside the gateway under test.
//
//   load engine --port P [--tick-us T] [--prefill-us D] [--pad-bytes B] [--seconds S]
//   load client --port P [--concurrency C] [--requests N] [--tokens M] [--prompt-bytes B] [--rate R]
//               [--path /v1/chat/completions] [--timeout-s S] [--keep-alive 0|1]
//               [--differ-at B [--prefixes N] [--first N]]
//
// load_engine.c and load_client.c say what each does; load_common.c is what both use. Everything stays on 127.0.0.1.
#include "load.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>

// One descriptor a stream: the usual soft limit of 1024 would be met by 576 streams on a gateway with two legs.
static void allow_many_descriptors(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN); // a peer that left is an error of write(), not the end of the program
    allow_many_descriptors();
    if (argc >= 2 && strcmp(argv[1], "engine") == 0) return run_engine(argc, argv);
    if (argc >= 2 && strcmp(argv[1], "client") == 0) return run_client(argc, argv);
    fprintf(stderr, "usage: load engine|client --port P [--option value]...   (options: see bench/load.c)\n");
    return 2;
}
