/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A stand-in for NVIDIA's management library, scripted by a file of `key=value` lines that FEDPIPE_NVML_SCRIPT names.
 * It is read at every init. A key that is missing answers "not supported"; `!N` answers error N, `!hang` never
 * answers and `!crash` ends the process. Only what the agent asks is here, with NVML's own signatures.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, PREFIX = 96 };

typedef struct { char prefix[PREFIX]; } *device_t;
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned int gpu, memory; } utilization_t;
typedef struct { unsigned int pid; unsigned long long memory; unsigned int instance, compute_instance; } process_t;

static char script[65536];
static int started;
static struct { char prefix[PREFIX]; } handles[1024];
static unsigned int handle_count;

/* Copy the value of `prefix.name` to `value`; return NVML's answer. */
static int ask(const char *prefix, const char *name, char *value, size_t size) {
    char key[128];
    int length = snprintf(key, sizeof key, "%s%s%s=", prefix, *prefix ? "." : "", name);
    for (const char *line = script; line && *line; line = strchr(line, '\n'), line = line ? line + 1 : NULL) {
        if (strncmp(line, key, (size_t)length) != 0) continue;
        line += length;
        size_t end = strcspn(line, "\n");
        if (end >= size) return INSUFFICIENT_SIZE;
        memcpy(value, line, end);
        value[end] = '\0';
        if (value[0] != '!') return SUCCESS;
        if (strcmp(value, "!hang") == 0) for (;;) pause();
        if (strcmp(value, "!crash") == 0) abort();
        return atoi(value + 1);
    }
    return NOT_SUPPORTED;
}

static int ask_number(const char *prefix, const char *name, unsigned long long *number) {
    char value[64];
    int answer = ask(prefix, name, value, sizeof value);
    if (answer == SUCCESS) *number = strtoull(value, NULL, 10);
    return answer;
}

static int ask_unsigned(const char *prefix, const char *name, unsigned int *number) {
    unsigned long long wide = 0;
    int answer = ask_number(prefix, name, &wide);
    if (answer == SUCCESS) *number = (unsigned int)wide;
    return answer;
}

static int ask_text(const char *prefix, const char *name, char *text, unsigned int size) {
    char value[256];
    int answer = ask(prefix, name, value, sizeof value);
    if (answer == SUCCESS) snprintf(text, size, "%s", value);
    return answer;
}

/* Hand out `prefix.kind.index`; its own key holds `ok`, or an error of the handle itself. */
static int open_handle(const char *prefix, const char *kind, unsigned int index, device_t *device) {
    char name[PREFIX], value[16];
    snprintf(name, sizeof name, "%s%s%s.%u", prefix, *prefix ? "." : "", kind, index);
    int answer = ask("", name, value, sizeof value);
    if (answer != SUCCESS) return answer == NOT_SUPPORTED ? NOT_FOUND : answer;
    if (handle_count == sizeof handles / sizeof *handles) return INSUFFICIENT_SIZE;
    snprintf(handles[handle_count].prefix, sizeof handles->prefix, "%s", name);
    *device = (device_t)&handles[handle_count++];
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    const char *path = getenv("FEDPIPE_NVML_SCRIPT");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return UNINITIALIZED;
    script[fread(script, 1, sizeof script - 1, file)] = '\0';
    fclose(file);
    char value[16];
    int answer = ask("", "init", value, sizeof value);
    if (answer == SUCCESS) started++;
    return answer;
}

int nvmlShutdown(void) {
    char value[16];
    if (!started) return UNINITIALIZED;
    started--;
    return ask("", "shutdown", value, sizeof value);
}

const char *nvmlErrorString(int code) {
    static char text[32];
    switch (code) {
    case 3: return "Not Supported";
    case 4: return "Insufficient Permissions";
    case 9: return "Driver Not Loaded";
    case 15: return "GPU is lost";
    case 16: return "GPU requires reset";
    case 18: return "Driver/library version mismatch";
    case 999: return "Unknown Error";
    }
    snprintf(text, sizeof text, "Error %d", code);
    return text;
}

int nvmlSystemGetDriverVersion(char *version, unsigned int size) { return ask_text("", "driver", version, size); }

int nvmlSystemGetCudaDriverVersion_v2(int *version) { return ask_unsigned("", "cuda", (unsigned int *)version); }

int nvmlDeviceGetCount_v2(unsigned int *count) { return ask_unsigned("", "count", count); }

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, device_t *device) {
    return open_handle("", "device", index, device);
}

static int has_uuid(device_t device, const char *uuid) {
    char found[256];
    return ask_text(device->prefix, "uuid", found, sizeof found) == SUCCESS && strcmp(found, uuid) == 0;
}

/* Of devices and MIG instances alike, as NVML does. */
int nvmlDeviceGetHandleByUUID(const char *uuid, device_t *device) {
    unsigned int count = 0, slots;
    device_t whole;
    ask_unsigned("", "count", &count);
    for (unsigned int index = 0; index < count; index++) {
        if (open_handle("", "device", index, &whole) != SUCCESS) continue;
        *device = whole;
        if (has_uuid(*device, uuid)) return SUCCESS;
        slots = 0;
        ask_unsigned(whole->prefix, "slots", &slots);
        for (unsigned int slot = 0; slot < slots; slot++)
            if (open_handle(whole->prefix, "instance", slot, device) == SUCCESS && has_uuid(*device, uuid))
                return SUCCESS;
    }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(device_t device, char *uuid, unsigned int size) {
    return ask_text(device->prefix, "uuid", uuid, size);
}

int nvmlDeviceGetName(device_t device, char *name, unsigned int size) {
    return ask_text(device->prefix, "name", name, size);
}

int nvmlDeviceGetCudaComputeCapability(device_t device, int *major, int *minor) {
    int answer = ask_unsigned(device->prefix, "major", (unsigned int *)major);
    return answer ? answer : ask_unsigned(device->prefix, "minor", (unsigned int *)minor);
}

int nvmlDeviceGetMemoryInfo(device_t device, memory_t *memory) {
    int answer = ask_number(device->prefix, "total", &memory->total);
    if (answer == SUCCESS) answer = ask_number(device->prefix, "free", &memory->free);
    if (answer == SUCCESS) memory->used = memory->total - memory->free;
    return answer;
}

int nvmlDeviceGetUtilizationRates(device_t device, utilization_t *utilization) {
    utilization->memory = 0;
    return ask_unsigned(device->prefix, "utilization", &utilization->gpu);
}

int nvmlDeviceGetEnforcedPowerLimit(device_t device, unsigned int *milliwatts) {
    return ask_unsigned(device->prefix, "power", milliwatts);
}

int nvmlDeviceGetEccMode(device_t device, int *current, int *pending) {
    int answer = ask_unsigned(device->prefix, "ecc", (unsigned int *)current);
    *pending = *current;
    return answer;
}

int nvmlDeviceGetMigMode(device_t device, unsigned int *current, unsigned int *pending) {
    int answer = ask_unsigned(device->prefix, "mig", current);
    *pending = *current;
    return answer;
}

int nvmlDeviceGetMaxMigDeviceCount(device_t device, unsigned int *count) {
    return ask_unsigned(device->prefix, "slots", count);
}

int nvmlDeviceGetMigDeviceHandleByIndex(device_t device, unsigned int index, device_t *instance) {
    return open_handle(device->prefix, "instance", index, instance);
}

int nvmlDeviceGetComputeRunningProcesses_v3(device_t device, unsigned int *count, process_t *processes) {
    unsigned int running = 0;
    int answer = ask_unsigned(device->prefix, "processes", &running);
    if (answer != SUCCESS) return answer;
    if (running > 0 && (!processes || *count < running)) {
        *count = running;
        return INSUFFICIENT_SIZE;
    }
    *count = running;
    for (unsigned int index = 0; index < running; index++) {
        char name[32];
        processes[index] = (process_t){.memory = ~0ULL}; /* "not available" */
        snprintf(name, sizeof name, "process.%u.pid", index);
        ask_unsigned(device->prefix, name, &processes[index].pid);
        snprintf(name, sizeof name, "process.%u.memory", index);
        ask_number(device->prefix, name, &processes[index].memory);
    }
    return SUCCESS;
}
