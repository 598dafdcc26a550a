/* A TEST DOUBLE of Pyxis (https://github.com/NVIDIA/pyxis) for the local Slurm of cluster.py. It is not Pyxis.
 *
 * What it does: registers Pyxis's options, writes one JSON line a task (containers.jsonl: job, step, node, rank, argv,
 * options, working directory, whether a container was entered, whether it was another step's), and really enters a squashfs
 * file: a mount namespace a step and node, made by the script `enroot` beside it, which every task joins. Missing images,
 * mount sources, working directories and names fail the step; mounts without image and name are ignored with a warning and
 * the command runs natively, as with the real one. Variables of the image win over the host's, but for --container-env,
 * and PATH is what a login shell in the container makes of it. The job's variables reach `enroot`, but ENROOT_DATA_PATH. A
 * step attaches to the container of its name that another step runs in, and ignores its own mounts then, unless the name
 * ends in :no_exec. Before 0.24, mounts with blanks fail.
 *
 * What it does not: registries (a bare name fails), --container-save, entrypoints, user namespaces and uid mapping
 * (tasks stay the job's user), seccomp, PYXIS_* variables, GPUs, isolation (anyone may read anything).
 *
 * plugstack.conf: required .../spank_pyxis.so FOLDER ENROOT
 * FOLDER/containers.jsonl is the record, FOLDER/containers/NAME what `ENROOT enter` keeps of a container.
 * gcc -shared -fPIC -DPYXIS_VERSION='"0.24.0"' -o spank_pyxis.so spank_containers.c */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

SPANK_PLUGIN(containers, 1)

#ifndef PYXIS_VERSION
#define PYXIS_VERSION "0.24.0"
#endif
static const char version[] = "pyxis: version v" PYXIS_VERSION; /* as in the real one; run.sub reads it there */

#define BATCH 0xfffffffbu /* SLURM_BATCH_SCRIPT, the step of a batch script */

enum { IMAGE, MOUNTS, WORKDIR, NAME, SAVE, HOME, NO_HOME, REMAP, NO_REMAP, WRITABLE, READONLY, ENTRYPOINT, NO_ENTRYPOINT,
       ENTRYPOINT_LOG, ENV, COUNT };

static char *given[COUNT];      /* what the user said; "" for an option without argument */
static char container[PATH_MAX]; /* name of this step's container; empty: native */
static int unnamed;              /* it is removed after the step */
static int failed;               /* errors of user_init don't reach srun, so that the task reports them */
static int namespace = -1;
static int attached;             /* to the namespace of a step that runs */
static uid_t uid;                /* of the job */
static gid_t gid;
static char workdir[PATH_MAX];   /* within the container; Slurm goes elsewhere between the two callbacks of a task */
static char **image_env;         /* NAME=VALUE of the image and of enroot's hooks */

static int keep(int option, const char *value, int remote)
{
    (void)remote;
    if (value == NULL) value = "";
    if (given[option] && strcmp(given[option], value)) {
        slurm_error("pyxis: an option of a container was specified twice: %s, %s", given[option], value);
        return -1;
    }
    free(given[option]);
    given[option] = strdup(value);
    return 0;
}

#define WITH(option, name, what) [option] = {name, what, "[test double of pyxis]", 1, option, keep}
#define FLAG(option, name) [option] = {name, NULL, "[test double of pyxis]", 0, option, keep}
static struct spank_option options[COUNT] = {
    WITH(IMAGE, "container-image", "PATH"),
    WITH(MOUNTS, "container-mounts", "SRC:DST[:FLAGS][,SRC:DST...]"),
    WITH(WORKDIR, "container-workdir", "PATH"),
    WITH(NAME, "container-name", "NAME"),
    WITH(SAVE, "container-save", "PATH"),
    FLAG(HOME, "container-mount-home"),
    FLAG(NO_HOME, "no-container-mount-home"),
    FLAG(REMAP, "container-remap-root"),
    FLAG(NO_REMAP, "no-container-remap-root"),
    FLAG(WRITABLE, "container-writable"),
    FLAG(READONLY, "container-readonly"),
    FLAG(ENTRYPOINT, "container-entrypoint"),
    FLAG(NO_ENTRYPOINT, "no-container-entrypoint"),
    FLAG(ENTRYPOINT_LOG, "container-entrypoint-log"),
    WITH(ENV, "container-env", "NAME[,NAME...]"),
};

int slurm_spank_init(spank_t sp, int ac, char **av)
{
    (void)ac, (void)av;
    spank_context_t context = spank_context();
    if (context != S_CTX_ALLOCATOR && context != S_CTX_LOCAL && context != S_CTX_REMOTE) return 0;
    for (int i = 0; i < COUNT; ++i)
        if (spank_option_register(sp, &options[i]) != ESPANK_SUCCESS) return -1;
    return 0;
}

/* Runs `enroot WORD...` to its end, as the job's user or as root. */
static int run(char **words, char **env, int as_user)
{
    int status;
    pid_t pid = fork();
    if (pid == 0) {
        if (as_user && (setgroups(0, NULL) || setresgid(gid, gid, gid) || setresuid(uid, uid, uid))) _exit(126);
        execve(words[0], words, env);
        perror(words[0]);
        _exit(127);
    }
    return pid < 0 || waitpid(pid, &status, 0) < 0 || status;
}

/* The child that builds the container: the script mounts, then this pivots into it, says so and waits for its end. */
static void build(char **av, char **env, int log, int go)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    dup2(log, 1), dup2(log, 2);
    if (seteuid(0) || setegid(0) || unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)) {
        perror("unshare");
        _exit(1);
    }
    char owner[32], root[PATH_MAX + 32], *image = given[IMAGE] ? given[IMAGE] : "";
    snprintf(owner, sizeof owner, "%u:%u", uid, gid);
    char *prepare[] = {av[1], "prepare", container, image, NULL};
    char *enter[] = {av[1], "enter", container, given[NAME] ? given[NAME] : "", image,
                     given[MOUNTS] ? given[MOUNTS] : "", given[WRITABLE] ? "rw" : "ro", given[HOME] ? "home" : "",
                     given[ENV] ? given[ENV] : "", owner, NULL};
    snprintf(root, sizeof root, "%s/root", container);
    if (run(prepare, env, 1) || run(enter, env, 0)) _exit(1);
    if (chdir(av[0]) || chdir("containers") || chdir(root) || syscall(SYS_pivot_root, ".", ".") ||
        umount2(".", MNT_DETACH)) {
        perror("pivot_root");
        _exit(1);
    }
    char ready = 6;
    if (write(log, &ready, 1) != 1) _exit(1);
    if (read(go, &ready, 1) < 0) _exit(1);
    _exit(0);
}

/* Runs build(); its words go to the user as errors when it fails. */
static int start(char **av, char **env)
{
    int log[2], go[2];
    char said[8192], path[PATH_MAX];
    size_t size = 0;
    ssize_t got;
    if (pipe2(log, O_CLOEXEC) || pipe2(go, O_CLOEXEC)) return -1;
    pid_t pid = fork();
    if (pid < 0) return -1;
    if (pid == 0) {
        close(go[1]);
        build(av, env, log[1], go[0]);
    }
    close(log[1]), close(go[0]);
    while (size < sizeof said - 1 && (got = read(log[0], said + size, sizeof said - 1 - size)) > 0)
        if (said[(size += got) - 1] == 6) {
            snprintf(path, sizeof path, "/proc/%d/ns/mnt", (int)pid);
            if (seteuid(0)) perror("seteuid"); /* the child is root's */
            namespace = open(path, O_RDONLY | O_CLOEXEC);
            if (seteuid(uid)) perror("seteuid");
            --size;
            break;
        }
    said[size] = 0;
    close(go[1]), close(log[0]);
    waitpid(pid, NULL, 0);
    for (char *next = said, *line; (line = strsep(&next, "\n"));)
        if (*line) slurm_error("pyxis: %s", line);
    return namespace < 0 ? -1 : 0;
}

/* The mount namespaces of a container's steps are lines of a file. Adds this step's, or looks for one that lives. */
static void find_space(const char *folder, int add)
{
    char path[2 * PATH_MAX];
    unsigned long one;
    struct stat about;
    struct dirent *entry;
    snprintf(path, sizeof path, "%s/containers/%s/spaces", folder, container);
    FILE *file = fopen(path, add ? "a" : "r");
    if (file && add && !fstat(namespace, &about)) fprintf(file, "%lu\n", (unsigned long)about.st_ino);
    while (file && !add && namespace < 0 && fscanf(file, "%lu", &one) == 1) {
        DIR *all = opendir("/proc");
        while (all && namespace < 0 && (entry = readdir(all))) {
            snprintf(path, sizeof path, "/proc/%s/ns/mnt", entry->d_name);
            if (stat(path, &about) || about.st_ino != one) continue;
            namespace = open(path, O_RDONLY | O_CLOEXEC);
            attached = namespace >= 0;
        }
        if (all) closedir(all);
    }
    if (file) fclose(file);
}

/* Of this step, or where it attaches, of the last that has built the container. */
static int read_environment(const char *folder, uint32_t step)
{
    char path[2 * PATH_MAX], *line = NULL;
    size_t room = 0, count = 0;
    snprintf(path, sizeof path, "%s/containers/%s/environ", folder, container);
    size_t end = strlen(path);
    if (!attached && step == BATCH) snprintf(path + end, sizeof path - end, ".batch");
    else if (!attached) snprintf(path + end, sizeof path - end, ".%u", step);
    FILE *file = fopen(path, "r");
    if (!file) return slurm_error("pyxis: %s: %m", path), 1;
    while (getline(&line, &room, file) > 0) {
        line[strcspn(line, "\n")] = 0;
        image_env = realloc(image_env, (count + 2) * sizeof *image_env);
        image_env[count++] = strdup(line);
        image_env[count] = NULL;
    }
    free(line);
    fclose(file);
    return 0;
}

int slurm_spank_user_init(spank_t sp, int ac, char **av)
{
    uint32_t job = 0, step = 0;
    int argc = 0;
    char **env = NULL, **argv = NULL, *mounts;
    if (!spank_remote(sp) || ac < 2) return 0;
    if (!given[IMAGE] && !given[NAME]) {
        for (int i = 0; i < COUNT; ++i)
            if (given[i])
                slurm_error("pyxis: ignoring --%s because neither --container-image nor --container-name is set",
                            options[i].name);
        return 0;
    }
    spank_get_item(sp, S_JOB_ID, &job);
    spank_get_item(sp, S_JOB_STEPID, &step);
    spank_get_item(sp, S_JOB_UID, &uid);
    spank_get_item(sp, S_JOB_GID, &gid);
    spank_get_item(sp, S_JOB_ENV, &env);
    spank_get_item(sp, S_JOB_ARGV, &argc, &argv);
    if (step == BATCH && argc > 0) { /* of sbatch --container-image: its script lies in slurmd's spool */
        if (asprintf(&mounts, "%s%s%s", given[MOUNTS] ? given[MOUNTS] : "", given[MOUNTS] ? "," : "", argv[0]) < 0)
            return 0;
        free(given[MOUNTS]);
        given[MOUNTS] = mounts;
    }
    unnamed = !given[NAME];
    if (unnamed) snprintf(container, sizeof container, "pyxis_%u.%u", job, step);
    else snprintf(container, sizeof container, "pyxis_%.*s", (int)strcspn(given[NAME], ":"), given[NAME]);
    int minor = 0;
    sscanf(version, "pyxis: version v0.%d", &minor);
    if (given[NAME] && !strstr(given[NAME], ":no_exec") && !seteuid(0)) { /* /proc of others */
        find_space(av[0], 0);
        if (seteuid(uid)) return -1;
    }
    if (minor < 24 && given[MOUNTS] && strchr(given[MOUNTS], ' ')) {
        slurm_error("pyxis: enroot-mount: failed to mount: invalid flags in %s", given[MOUNTS]);
        failed = 1;
    } else if (!attached) {
        failed = start(av, env);
        if (!failed) find_space(av[0], 1);
    }
    if (!failed) failed = read_environment(av[0], step);
    return 0;
}

static void put_string(FILE *to, const char *text)
{
    fputc('"', to);
    for (const unsigned char *c = (const unsigned char *)text; *c; ++c)
        if (*c == '"' || *c == '\\') fprintf(to, "\\%c", *c);
        else if (*c < ' ') fprintf(to, "\\u%04x", *c);
        else fputc(*c, to);
    fputc('"', to);
}

/* One line, in one write, so that tasks don't mix theirs. */
static void record(spank_t sp, int file)
{
    char *line = NULL, host[256] = "", cwd[PATH_MAX] = "", **argv = NULL;
    size_t size = 0;
    uint32_t job = 0, step = 0, rank = 0;
    int argc = 0;
    const char *comma = "";
    spank_get_item(sp, S_JOB_ID, &job);
    spank_get_item(sp, S_JOB_STEPID, &step);
    spank_get_item(sp, S_TASK_GLOBAL_ID, &rank);
    spank_get_item(sp, S_JOB_ARGV, &argc, &argv);
    gethostname(host, sizeof host - 1);
    if (!getcwd(cwd, sizeof cwd)) snprintf(cwd, sizeof cwd, "?");
    FILE *to = open_memstream(&line, &size);
    fprintf(to, "{\"job\": %u, \"step\": ", job);
    if (step == BATCH) fputs("\"batch\"", to);
    else fprintf(to, "%u", step);
    fprintf(to, ", \"node\": \"%s\", \"rank\": %u, \"entered\": %s, \"cwd\": ", host, rank,
            namespace < 0 ? "false" : "true");
    put_string(to, cwd);
    fprintf(to, ", \"attached\": %s", attached ? "true" : "false");
    fputs(", \"argv\": [", to);
    for (int i = 0; i < argc; ++i, comma = ", ") fputs(comma, to), put_string(to, argv[i]);
    fputs("], \"options\": {", to);
    comma = "";
    for (int i = 0; i < COUNT; ++i)
        if (given[i]) {
            fprintf(to, "%s\"%s\": ", comma, options[i].name);
            if (options[i].has_arg) put_string(to, given[i]);
            else fputs("true", to);
            comma = ", ";
        }
    fputs("}}\n", to);
    fclose(to);
    if (write(file, line, size) != (ssize_t)size) slurm_error("pyxis: cannot write the record");
    free(line);
}

static int enter(void)
{
    if (failed) return -1;
    if (namespace < 0) return 0;
    if (setns(namespace, CLONE_NEWNS)) {
        slurm_error("pyxis: couldn't join the container: %s", strerror(errno));
        return -1;
    }
    if (given[WORKDIR] ? chdir(given[WORKDIR]) : chdir("/root") && chdir("/")) {
        slurm_error("pyxis: couldn't chdir to %s: %s", given[WORKDIR] ? given[WORKDIR] : "/root", strerror(errno));
        return -1;
    }
    return getcwd(workdir, sizeof workdir) ? 0 : -1;
}

/* Here and not in task_init, because Slurm looks for the program on PATH between the two. */
int slurm_spank_task_init_privileged(spank_t sp, int ac, char **av)
{
    char path[PATH_MAX];
    if (ac < 2) return 0;
    snprintf(path, sizeof path, "%s/containers.jsonl", av[0]);
    int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    int result = enter();
    if (file >= 0) {
        record(sp, file);
        close(file);
    }
    for (char **pair = image_env; !result && pair && *pair; ++pair) {
        char *name = *pair, *value = name;
        strsep(&value, "=");
        if (value) spank_setenv(sp, name, value, 1);
    }
    return result;
}

/* Back to the working directory; and Pyxis itself gives PyTorch images these two variables, whoever set them before. */
int slurm_spank_task_init(spank_t sp, int ac, char **av)
{
    (void)ac, (void)av;
    char value[4096];
    if (namespace < 0) return 0;
    if (chdir(workdir)) return -1;
    if (spank_getenv(sp, "PYTORCH_VERSION", value, sizeof value) != ESPANK_SUCCESS) return 0;
    if (spank_getenv(sp, "SLURM_PROCID", value, sizeof value) == ESPANK_SUCCESS) spank_setenv(sp, "RANK", value, 1);
    if (spank_getenv(sp, "SLURM_LOCALID", value, sizeof value) == ESPANK_SUCCESS)
        spank_setenv(sp, "LOCAL_RANK", value, 1);
    return 0;
}

int slurm_spank_exit(spank_t sp, int ac, char **av)
{
    if (!spank_remote(sp) || ac < 2 || !*container) return 0;
    if (namespace >= 0) close(namespace);
    pid_t pid = unnamed ? fork() : -1;
    if (pid == 0) {
        close(2);  /* nothing to remove where the image was missing */
        execl(av[1], av[1], "remove", "-f", container, NULL);
        _exit(127);
    }
    if (pid > 0) waitpid(pid, NULL, 0);
    return 0;
}
