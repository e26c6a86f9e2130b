// A mock vLLM engine with NIXL hand-off, on 127.0.0.1.
//
//   --port P         where to listen
//   --tick-us T      one token for every running stream each T microseconds, all on the same tick, as a
//                    continuous-batching engine does; 0: as fast as each stream's socket takes them
//   --prefill-us D   time that a prefill leg takes, in microseconds; they are computed one after the other
//   --pad-bytes B    bytes added to each token's event (what log-probabilities or tool calls do)
//   --seconds S      the engine ends by itself after so long; it also ends with the process that started it
//
// A request is a prefill leg when its kv_transfer_params ask for a remote decode: it is answered at once with the
// parameters a NixlConnector gives. A decode leg that claims a remote prefill without those parameters is refused
// with 400, where a real engine would hang or die. A decode leg without any is served and counted as local.
//
// Each token's text is " @<n>" with n its send time in CLOCK_MONOTONIC nanoseconds. It stands in the text, not in a
// field of its own, so that it survives a gateway that parses and rewrites the events.
#define _GNU_SOURCE
#include "load.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <signal.h>
#include <unistd.h>

enum { MOST_CONNECTIONS = 16384, MOST_PAD_BYTES = 8192, BYTES_PER_TOKEN = 4, TOKENS_PER_BLOCK = 16 };

// What one request asked for, and how far its answer is.
typedef struct {
    bool chat, prefill, streaming, usage, token_ids, role_sent;
    long number, tokens, left, prompt_tokens;
    int64_t due_ns;
} Generation;

typedef struct Connection {
    int fd;
    int slot; // place among the running ones; -1: nothing runs
    bool watching_write, close_after, dead;
    Buffer in, out;
    Generation work;
} Connection;

static struct {
    int epoll, listener, timer;
    long tick_us, prefill_us, connections;
    int64_t prefilled_ns; // when all prefill legs that have come are computed
    char pad[MOST_PAD_BYTES + 1];
    Connection *running[MOST_CONNECTIONS];
    int running_count;
    struct {
        long prefill, decode, handed_off, refused, tokens, aborted;
    } counted;
} engine;

// ---------------------------------------------------------------------------------------------------- writing

static void watch(Connection *connection, bool write) {
    if (connection->watching_write == write) return;
    struct epoll_event event = {.events = EPOLLIN | (write ? EPOLLOUT : 0), .data.ptr = connection};
    epoll_ctl(engine.epoll, EPOLL_CTL_MOD, connection->fd, &event);
    connection->watching_write = write;
}

// Writes what the socket takes and waits for room if something is left.
static void flush_out(Connection *connection) {
    while (buffer_size(&connection->out) && !connection->dead) {
        ssize_t written = write(connection->fd, buffer_bytes(&connection->out), buffer_size(&connection->out));
        if (written < 0 && errno == EAGAIN) break;
        if (written < 0) connection->dead = true;
        else buffer_take(&connection->out, (size_t)written);
    }
    bool left = buffer_size(&connection->out) > 0;
    if (!left && connection->close_after && connection->slot < 0) connection->dead = true;
    if (!connection->dead) watch(connection, left);
}

static void answer(Connection *connection, const char *status, const char *type, const Buffer *body) {
    buffer_print(&connection->out, "HTTP/1.1 %s\r\nserver: uvicorn\r\ncontent-type: %s\r\ncontent-length: %zu\r\n\r\n",
                 status, type, buffer_size(body));
    buffer_append(&connection->out, buffer_bytes(body), buffer_size(body));
    flush_out(connection);
}

static void answer_text(Connection *connection, const char *status, const char *text) {
    Buffer body = {0};
    buffer_print(&body, "%s", text);
    answer(connection, status, "application/json", &body);
    buffer_free(&body);
}

static void refuse(Connection *connection, const char *reason) {
    char text[512];
    snprintf(text, sizeof text,
             "{\"error\":{\"message\":\"%s\",\"type\":\"BadRequestError\",\"param\":null,\"code\":400}}", reason);
    engine.counted.refused++;
    answer_text(connection, "400 Bad Request", text);
}

// ---------------------------------------------------------------------------------------------------- running

static void start_running(Connection *connection) {
    connection->slot = engine.running_count;
    engine.running[engine.running_count++] = connection;
}

static void stop_running(Connection *connection) {
    if (connection->slot < 0) return;
    Connection *last = engine.running[--engine.running_count];
    engine.running[connection->slot] = last;
    last->slot = connection->slot;
    connection->slot = -1;
}

static void print_usage(Buffer *body, const Generation *work, long completion_tokens) {
    buffer_print(body, "\"usage\":{\"prompt_tokens\":%ld,\"total_tokens\":%ld,\"completion_tokens\":%ld}",
                 work->prompt_tokens, work->prompt_tokens + completion_tokens, completion_tokens);
}

// What a NixlConnector answers after a prefill: as many blocks as the prompt fills.
static void print_transfer_params(Buffer *body, const Generation *work) {
    buffer_print(body, "\"kv_transfer_params\":{\"do_remote_prefill\":true,\"do_remote_decode\":false,"
                       "\"remote_block_ids\":[[1");
    for (long block = 2; block <= work->prompt_tokens / TOKENS_PER_BLOCK; block++) buffer_print(body, ",%ld", block);
    buffer_print(body,
                 "]],\"remote_engine_id\":\"0b7f6a52-5f5e-4d57-9d1a-6a1c4be1f0aa\","
                 "\"remote_request_id\":\"cmpl-%032ld-0-1a2b3c4d\",\"remote_host\":\"127.0.0.1\",\"remote_port\":5600,"
                 "\"tp_size\":1,\"dcp_size\":1,\"pp_size\":1,\"remote_num_tokens\":%ld,"
                 "\"remote_blocks_expiry_time\":null,\"transfer_mode\":\"pull\",\"remote_prefill_cached_tokens\":0}",
                 work->number, work->prompt_tokens);
}

// The whole answer of a request that does not stream: a prefill leg, or a decode leg whose client waits for all of it.
static void answer_whole(Connection *connection) {
    const Generation *work = &connection->work;
    Buffer body = {0};
    const char *prompt_ids = work->token_ids ? ",\"prompt_token_ids\":[1,2,3,4,5,6,7,8]" : "";
    const char *ids = work->token_ids ? ",\"token_ids\":[299]" : "";
    buffer_print(&body,
                 "{\"id\":\"%s-%032ld\",\"object\":\"%s\",\"created\":1,\"model\":\"m\","
                 "\"choices\":[{\"index\":0,",
                 work->chat ? "chatcmpl" : "cmpl", work->number, work->chat ? "chat.completion" : "text_completion");
    buffer_print(&body, work->chat ? "\"message\":{\"role\":\"assistant\",\"content\":\"" : "\"text\":\"");
    for (long i = 0; i < work->tokens; i++) buffer_print(&body, " tok");
    buffer_print(&body, "%s,\"logprobs\":null,\"finish_reason\":\"length\"%s%s}],", work->chat ? "\"}" : "\"", ids,
                 work->chat ? "" : prompt_ids);
    print_usage(&body, work, work->tokens);
    if (work->chat) buffer_print(&body, "%s", prompt_ids);
    if (work->prefill) {
        buffer_print(&body, ",");
        print_transfer_params(&body, work);
    } else {
        buffer_print(&body, ",\"kv_transfer_params\":null");
        engine.counted.tokens += work->tokens;
    }
    buffer_print(&body, "}");
    stop_running(connection);
    answer(connection, "200 OK", "application/json", &body);
    buffer_free(&body);
}

static Buffer scratch; // one event at a time is written here, then framed as an HTTP chunk

static void send_event(Connection *connection) {
    buffer_print(&connection->out, "%zx\r\n", buffer_size(&scratch));
    buffer_append(&connection->out, buffer_bytes(&scratch), buffer_size(&scratch));
    buffer_append(&connection->out, "\r\n", 2);
    buffer_clear(&scratch);
}

static void start_event(const Generation *work) {
    buffer_print(&scratch, "data: {\"id\":\"%s-%032ld\",\"object\":\"%s\",\"created\":1,\"model\":\"m\",\"choices\":[",
                 work->chat ? "chatcmpl" : "cmpl", work->number,
                 work->chat ? "chat.completion.chunk" : "text_completion");
}

// Chat answers begin with an event that has no token, only the role.
static void send_role(Connection *connection) {
    start_event(&connection->work);
    buffer_print(&scratch,
                 "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,"
                 "\"finish_reason\":null}]%s}\n\n",
                 connection->work.token_ids ? ",\"prompt_token_ids\":[1,2,3,4,5,6,7,8]" : "");
    send_event(connection);
    connection->work.role_sent = true;
}

static void send_token(Connection *connection) {
    Generation *work = &connection->work;
    const char *finish = work->left == 1 ? "\"length\"" : "null";
    char ids[64] = "";
    if (work->token_ids) snprintf(ids, sizeof ids, ",\"token_ids\":[%ld]", 300 + work->left % 9000);
    start_event(work);
    if (work->chat)
        buffer_print(&scratch,
                     "{\"index\":0,\"delta\":{\"content\":\" @%" PRId64 "%s\"},\"logprobs\":null,"
                     "\"finish_reason\":%s%s}]}\n\n",
                     now_ns(), engine.pad, finish, ids);
    else
        buffer_print(&scratch,
                     "{\"index\":0,\"text\":\" @%" PRId64 "%s\",\"logprobs\":null,\"finish_reason\":%s,"
                     "\"stop_reason\":null%s%s}]}\n\n",
                     now_ns(), engine.pad, finish, work->token_ids ? ",\"prompt_token_ids\":null" : "", ids);
    send_event(connection);
    work->left--;
    engine.counted.tokens++;
}

static void send_end(Connection *connection) {
    Generation *work = &connection->work;
    if (work->usage) {
        start_event(work);
        buffer_print(&scratch, "],");
        print_usage(&scratch, work, work->tokens);
        buffer_print(&scratch, "}\n\n");
        send_event(connection);
    }
    buffer_print(&scratch, "data: [DONE]\n\n");
    send_event(connection);
    buffer_append(&connection->out, "0\r\n\r\n", 5);
    stop_running(connection);
}

// One token of one running request; says whether anything was done.
static bool advance(Connection *connection, bool ticked) {
    Generation *work = &connection->work;
    if (work->prefill) {
        if (now_ns() < work->due_ns) return false;
        answer_whole(connection);
        return true;
    }
    bool ready = engine.tick_us ? ticked : buffer_size(&connection->out) == 0;
    if (!ready) return false;
    if (!work->streaming) {
        if (--work->left == 0) answer_whole(connection);
        return true;
    }
    if (work->chat && !work->role_sent) send_role(connection);
    send_token(connection);
    if (work->left == 0) send_end(connection);
    flush_out(connection);
    return true;
}

// ---------------------------------------------------------------------------------------------------- requests

static bool json_is_number(Text value) { return text_number(value, -1) >= 0; }

// What a decode leg that claims a remote prefill lacks of its parameters, or NULL.
static const char *lacking(Text params) {
    if (!json_starts(json_member(params, "remote_block_ids"), '[')) return "no list remote_block_ids";
    if (!json_starts(json_member(params, "remote_engine_id"), '"')) return "no string remote_engine_id";
    if (!json_starts(json_member(params, "remote_request_id"), '"')) return "no string remote_request_id";
    if (!json_starts(json_member(params, "remote_host"), '"')) return "no string remote_host";
    if (!json_is_number(json_member(params, "remote_port"))) return "no number remote_port";
    if (!json_is_number(json_member(params, "tp_size"))) return "no number tp_size";
    return NULL;
}

static void generate(Connection *connection, Text target, Text body) {
    Text params = json_member(body, "kv_transfer_params");
    Text max_tokens = json_member(body, "max_completion_tokens");
    if (text_number(max_tokens, 0) == 0) max_tokens = json_member(body, "max_tokens");
    bool claims_prefill = json_is_true(json_member(params, "do_remote_prefill"));
    Generation work = {
        .chat = text_contains(target, "/chat/"),
        .prefill = json_is_true(json_member(params, "do_remote_decode")),
        .streaming = json_is_true(json_member(body, "stream")),
        .usage = json_is_true(json_member(json_member(body, "stream_options"), "include_usage")),
        .token_ids = json_is_true(json_member(body, "return_token_ids")),
        .number = engine.counted.prefill + engine.counted.decode + 1,
        .tokens = text_number(max_tokens, 16),
        .prompt_tokens = (body.end - body.at) / BYTES_PER_TOKEN,
    };
    work.left = work.tokens;
    const char *reason = claims_prefill ? lacking(params) : NULL;
    if (!json_starts(body, '{') || work.tokens < 1) reason = "the body is no JSON object, or asks for no token";
    if (work.prefill && work.streaming) reason = "a prefill leg that streams never gets its kv_transfer_params";
    if (reason) {
        refuse(connection, reason);
        return;
    }
    if (work.prefill) {
        int64_t now = now_ns(), begin_ns = engine.prefilled_ns > now ? engine.prefilled_ns : now;
        work.due_ns = engine.prefilled_ns = begin_ns + engine.prefill_us * 1000;
    }
    connection->work = work;
    *(work.prefill ? &engine.counted.prefill : &engine.counted.decode) += 1;
    engine.counted.handed_off += claims_prefill;
    start_running(connection);
    if (work.prefill && !engine.prefill_us) {
        answer_whole(connection);
    } else if (work.streaming) {
        buffer_print(&connection->out, "HTTP/1.1 200 OK\r\nserver: uvicorn\r\n"
                                       "content-type: text/event-stream; charset=utf-8\r\n"
                                       "transfer-encoding: chunked\r\n\r\n");
        flush_out(connection);
    }
}

static void answer_metrics(Connection *connection) {
    Buffer body = {0};
    buffer_print(&body,
                 "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{model_name=\"m\"} %d\n"
                 "# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{model_name=\"m\"} 0\n"
                 "# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc{model_name=\"m\"} 0.1\n",
                 engine.running_count);
    answer(connection, "200 OK", "text/plain; version=0.0.4", &body);
    buffer_free(&body);
}

// What this engine did so far, for the bench: not a route of vLLM.
static void answer_counted(Connection *connection) {
    Buffer body = {0};
    buffer_print(&body,
                 "{\"prefill\":%ld,\"decode\":%ld,\"handed_off\":%ld,\"refused\":%ld,\"tokens\":%ld,\"aborted\":%ld,"
                 "\"running\":%d,\"connections\":%ld}",
                 engine.counted.prefill, engine.counted.decode, engine.counted.handed_off, engine.counted.refused,
                 engine.counted.tokens, engine.counted.aborted, engine.running_count, engine.connections);
    answer(connection, "200 OK", "application/json", &body);
    buffer_free(&body);
}

static bool asks_for(Text request_line, const char *start) {
    size_t size = strlen(start);
    return (size_t)(request_line.end - request_line.at) >= size && memcmp(request_line.at, start, size) == 0;
}

static void route(Connection *connection, Text line, Text body) {
    if (asks_for(line, "POST /v1/chat/completions ") || asks_for(line, "POST /v1/completions "))
        generate(connection, line, body);
    else if (asks_for(line, "GET /health "))
        answer_text(connection, "200 OK", "");
    else if (asks_for(line, "GET /v1/models "))
        answer_text(connection, "200 OK",
                    "{\"object\":\"list\",\"data\":[{\"id\":\"m\",\"object\":\"model\",\"created\":1,"
                    "\"owned_by\":\"vllm\",\"root\":\"m\",\"parent\":null,\"max_model_len\":131072}]}");
    else if (asks_for(line, "GET /version "))
        answer_text(connection, "200 OK", "{\"version\":\"0.32.0\"}");
    else if (asks_for(line, "GET /metrics "))
        answer_metrics(connection);
    else if (asks_for(line, "GET /counted "))
        answer_counted(connection);
    else
        answer_text(connection, "404 Not Found", "{\"detail\":\"Not Found\"}");
}

// Walks the chunks of a chunked body. Gives the bytes of input that the whole body takes, or 0 while it is incomplete;
// with `join` the chunks' contents are moved together to the front and *joined is their size.
static size_t walk_chunks(char *at, size_t size, bool join, size_t *joined) {
    size_t position = 0;
    *joined = 0;
    for (;;) {
        char *line_end = position < size ? memchr(at + position, '\n', size - position) : NULL;
        if (!line_end) return 0;
        size_t chunk = strtoul(at + position, NULL, 16), data = (size_t)(line_end + 1 - at);
        if (chunk > LARGEST_MESSAGE || data + chunk + 2 > size) return 0;
        if (join) memmove(at + *joined, at + data, chunk);
        *joined += chunk;
        position = data + chunk + 2;
        if (chunk == 0) return position; // trailers are not expected of a gateway
    }
}

// Serves the first request held in the connection's buffer; says whether there was a complete one.
static bool serve_one(Connection *connection) {
    if (connection->slot >= 0 || connection->dead || connection->close_after) return false;
    char *start = buffer_bytes(&connection->in);
    size_t held = buffer_size(&connection->in);
    char *head_end = held ? memmem(start, held, "\r\n\r\n", 4) : NULL;
    if (!head_end) return false;
    char *body = head_end + 4;
    size_t head_size = (size_t)(body - start), body_size, body_taken;
    Text head = {start, body};
    if (text_contains(http_header(head, "transfer-encoding"), "chunked")) {
        if (!walk_chunks(body, held - head_size, false, &body_size)) return false;
        body_taken = walk_chunks(body, held - head_size, true, &body_size);
    } else {
        body_size = body_taken = (size_t)text_number(http_header(head, "content-length"), 0);
        if (held - head_size < body_size) return false;
    }
    Text line = {start, memchr(start, '\r', head_size)};
    connection->close_after =
        text_contains(http_header(head, "connection"), "close") || text_contains(line, "HTTP/1.0");
    route(connection, line, (Text){body, body + body_size});
    buffer_take(&connection->in, head_size + body_taken);
    return true;
}

// ---------------------------------------------------------------------------------------------------- connections

static void accept_all(void) {
    int fd;
    while ((fd = accept4(engine.listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        Connection *connection = engine.connections < MOST_CONNECTIONS ? calloc(1, sizeof *connection) : NULL;
        if (!connection) {
            close(fd);
            continue;
        }
        *connection = (Connection){.fd = fd, .slot = -1};
        engine.connections++;
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};
        epoll_ctl(engine.epoll, EPOLL_CTL_ADD, fd, &event);
    }
}

static void drop(Connection *connection) {
    if (connection->slot >= 0) engine.counted.aborted++;
    stop_running(connection);
    close(connection->fd);
    buffer_free(&connection->in);
    buffer_free(&connection->out);
    free(connection);
    engine.connections--;
}

static void read_in(Connection *connection) {
    static char bytes[READ_BYTES];
    ssize_t size;
    while ((size = read(connection->fd, bytes, sizeof bytes)) > 0) {
        buffer_append(&connection->in, bytes, (size_t)size);
        if (buffer_size(&connection->in) > LARGEST_MESSAGE) break;
    }
    if (size >= 0 || errno != EAGAIN) connection->dead = true; // closed, broken or too large
}

static void serve(Connection *connection, uint32_t events) {
    if (events & EPOLLOUT) flush_out(connection);
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) read_in(connection);
    while (serve_one(connection)) {}
    if (connection->dead) drop(connection);
}

// One round over all running requests; says whether any of them moved.
static bool advance_all(bool ticked) {
    bool moved = false;
    // Backwards: a request that ends is replaced by the last one, which has had its turn.
    for (int i = engine.running_count - 1; i >= 0; i--) {
        Connection *connection = engine.running[i];
        moved |= advance(connection, ticked);
        while (serve_one(connection)) {} // a request that was sent behind the one that just ended
        if (connection->dead) drop(connection);
    }
    return moved;
}

// ---------------------------------------------------------------------------------------------------- the program

static int start_timer(long tick_us) {
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct timespec tick = {tick_us / 1000000, tick_us % 1000000 * 1000};
    struct itimerspec every = {tick, tick};
    if (timer < 0 || timerfd_settime(timer, 0, &every, NULL)) die("start the tick");
    return timer;
}

static void add_source(int fd, int *source) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = source};
    if (epoll_ctl(engine.epoll, EPOLL_CTL_ADD, fd, &event)) die("watch a descriptor");
}

// How long to sleep, in milliseconds. Without a tick the streams are advanced until all of them wait for their socket.
static int patience(bool moved) {
    if (engine.tick_us == 0 && moved && engine.running_count) return 0;
    return engine.prefill_us && engine.running_count ? 1 : 1000;
}

int run_engine(int argc, char **argv) {
    static const char *const known[] = {"--port", "--tick-us", "--prefill-us", "--pad-bytes", "--seconds", NULL};
    options_check(argc, argv, known);
    long port = option_number(argc, argv, "--port", 0, 1, 65535);
    long pad_bytes = option_number(argc, argv, "--pad-bytes", 0, 0, MOST_PAD_BYTES);
    int64_t end_ns = now_ns() + option_number(argc, argv, "--seconds", 3600, 1, 24 * 3600) * 1000000000LL;
    engine.tick_us = option_number(argc, argv, "--tick-us", 0, 0, 60 * 1000 * 1000);
    engine.prefill_us = option_number(argc, argv, "--prefill-us", 0, 0, 60 * 1000 * 1000);
    memset(engine.pad, 'y', (size_t)pad_bytes);
    prctl(PR_SET_PDEATHSIG, SIGTERM);

    engine.listener = listen_on_loopback(port);
    engine.epoll = epoll_create1(EPOLL_CLOEXEC);
    add_source(engine.listener, &engine.listener);
    if (engine.tick_us) {
        engine.timer = start_timer(engine.tick_us);
        add_source(engine.timer, &engine.timer);
    }
    struct epoll_event events[512];
    bool moved = false;
    while (now_ns() < end_ns) {
        int count = epoll_wait(engine.epoll, events, 512, patience(moved));
        bool ticked = false;
        for (int i = 0; i < count; i++) {
            uint64_t expirations;
            if (events[i].data.ptr == &engine.listener) accept_all();
            else if (events[i].data.ptr == &engine.timer)
                ticked = read(engine.timer, &expirations, sizeof expirations) == sizeof expirations;
            else serve(events[i].data.ptr, events[i].events);
        }
        moved = advance_all(ticked);
    }
    return 0;
}
