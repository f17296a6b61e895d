// Tests of csrc/system/parallel.h, without a framework: says what failed and exits with 1, or with
// 0.
//
//     g++ -std=c++17 -O2 -pthread -Icsrc {tests/native/parallel_test,csrc/system/parallel}.cc
//     ./a.out              # a few seconds
//     ./a.out --latency    # measures instead
//
// Also meant for -fsanitize=address,undefined and -fsanitize=thread. POSIX only.

#include "system/parallel.h"

#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#if defined(__has_feature)
#define HAS_FEATURE(name) __has_feature(name)
#else
#define HAS_FEATURE(name) 0
#endif
#if defined(__SANITIZE_THREAD__) || HAS_FEATURE(thread_sanitizer)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif
#if defined(__SANITIZE_ADDRESS__) || HAS_FEATURE(address_sanitizer)
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      _exit(1);                                                                    \
    }                                                                              \
  } while (false)

using batchnorm::parallel_for;
using batchnorm::set_num_threads;
using Clock = std::chrono::steady_clock;

namespace {

double microseconds(Clock::duration duration) {
  return std::chrono::duration<double, std::micro>(duration).count();
}

void busy(double duration) {
  for (const auto start = Clock::now(); microseconds(Clock::now() - start) < duration;) {
  }
}

// Every task exactly once, and what it wrote is there afterwards: plain integers, so that
// ThreadSanitizer sees a race.
void check_coverage(int tasks) {
  std::vector<int> runs(static_cast<std::size_t>(std::max(tasks, 0)));
  parallel_for(tasks, [&](int task) { ++runs[static_cast<std::size_t>(task)]; });
  CHECK(std::count(runs.begin(), runs.end(), 1) == static_cast<std::ptrdiff_t>(runs.size()));
}

// Two tasks that wait for one another can only end if two threads run them.
void rendezvous() {
  std::atomic<int> present{0};
  parallel_for(2, [&](int) {
    for (++present; present < 2;) std::this_thread::yield();
  });
}

void test_coverage() {
  for (int threads : {1, 2, 3, 8}) {
    set_num_threads(threads);
    for (int tasks : {-1, 0, 1, 2, 3, 4, 7, 8, 9, 63, 64, 65, 1000, 30000}) check_coverage(tasks);
    for (int call = 0; call < 1000; ++call) check_coverage(call % 11);
  }
}

void test_several_threads_work() {
  set_num_threads(2);
  for (int call = 0; call < 200; ++call) {
    rendezvous();
    // Now and then the worker falls asleep.
    if (call % 20 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

// Two tasks, of different shares, that wait for each other: each thread has begun with its own.
void test_shares(batchnorm::Team team) {
  set_num_threads(2);
  for (const batchnorm::Order order : {batchnorm::Order::upwards, batchnorm::Order::downwards}) {
    const bool up = order == batchnorm::Order::upwards;
    for (int call = 0; call < 100; ++call) {
      std::atomic<int> begun{0};
      std::vector<int> of_seat[2];
      const auto run = [&](int task, int seat) {
        if (of_seat[seat].empty()) {
          ++begun;
          while (begun < 2) std::this_thread::yield();
        }
        of_seat[seat].push_back(task);
      };
      parallel_for(10, 2, run, team, order);
      CHECK(of_seat[0].front() == (up ? 0 : 4));
      CHECK(of_seat[1].front() == (up ? 5 : 9));
      for (const std::vector<int>& tasks : of_seat) {
        const auto end = tasks.begin() + std::min<std::ptrdiff_t>(5, tasks.end() - tasks.begin());
        CHECK(up ? std::is_sorted(tasks.begin(), end)
                 : std::is_sorted(tasks.begin(), end, std::greater<int>()));
      }
    }
  }
}

void test_unequal_tasks() {
  set_num_threads(4);
  for (int longest : {0, 3, 5}) {  // the caller's first task, one in the middle, the last
    for (int call = 0; call < 20; ++call) {
      int done[6] = {};
      parallel_for(6, [&](int task) {
        busy(task == longest ? 300 : 5);
        done[task] = 1;
      });
      CHECK(std::count(done, done + 6, 1) == 6);
    }
  }
}

void test_nested() {
  set_num_threads(3);
  for (int call = 0; call < 100; ++call) {
    int runs[4][5][6] = {};
    parallel_for(4, [&](int i) {
      parallel_for(5, [&](int j) {  //
        parallel_for(6, [&](int k) { ++runs[i][j][k]; });
      });
    });
    CHECK(std::count(&runs[0][0][0], &runs[0][0][0] + 4 * 5 * 6, 1) == 4 * 5 * 6);
  }
}

// Calls from `callers` threads at once, until stopped.
class Callers {
 public:
  explicit Callers(int callers) {
    for (int caller = 0; caller < callers; ++caller) {
      threads.emplace_back([this, caller] {
        for (int call = 0; !stopped || call < 100; ++call) {
          int runs[16] = {};
          const int tasks = (call + caller) % 17;
          parallel_for(tasks, [&](int task) {
            ++runs[task];
            if (call % 50 == 0) parallel_for(3, [&](int) {});
          });
          CHECK(std::count(runs, runs + 16, 1) == tasks);
        }
      });
    }
  }
  ~Callers() {
    stopped = true;
    for (std::thread& thread : threads) thread.join();
  }

 private:
  std::atomic<bool> stopped{false};
  std::vector<std::thread> threads;
};

void test_concurrent_callers() {
  for (int threads : {2, 4}) {
    set_num_threads(threads);
    Callers callers(8);
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
}

void test_set_num_threads_during_calls() {
  Callers callers(3);
  for (int change = 0; change < 300; ++change) {
    set_num_threads(1 + change % 6);
    CHECK(batchnorm::num_threads() == 1 + change % 6);
    check_coverage(20);
    std::this_thread::sleep_for(std::chrono::microseconds(300));
  }
}

void test_floating_point_environment() {
  set_num_threads(2);
  for (int rounding : {FE_UPWARD, FE_TONEAREST}) {
    std::fesetround(rounding);
    std::atomic<int> present{0};
    parallel_for(2, [&](int) {
      for (++present; present < 2;) std::this_thread::yield();
      CHECK(std::fegetround() == rounding);
    });
  }
}

// A team of four, started anew for every call, of which its user wants fewer now and then.
std::atomic<int> team_calls{0}, team_threads{4};
thread_local int team_member = -1;
void start_four(void (*function)(void*), void* argument, unsigned, unsigned) {
  ++team_calls;
  std::vector<std::thread> members;
  for (int member = 0; member < 4; ++member) {
    members.emplace_back([=] {
      team_member = member;
      std::fesetround(FE_DOWNWARD);
      function(argument);
      CHECK(std::fegetround() == FE_DOWNWARD);
    });
  }
  for (std::thread& member : members) member.join();
}
const batchnorm::OpenMp team = {start_four, [] { return team_threads.load(); },
                                [] { return team_member; }};

void test_team() {
  for (int threads : {2, 3, 8}) {
    set_num_threads(threads);
    for (int tasks : {2, 3, 7, 1000}) {
      std::vector<int> runs(static_cast<std::size_t>(tasks));
      std::mutex mutex;
      std::set<std::thread::id> members;
      const auto run = [&](int task) {
        CHECK(team_member >= 0);
        CHECK(std::fegetround() == FE_TONEAREST);
        ++runs[static_cast<std::size_t>(task)];
        std::lock_guard<std::mutex> lock(mutex);
        members.insert(std::this_thread::get_id());
      };
      for (int wanted : {4, 2}) {
        team_threads = wanted;
        members.clear();
        std::fill(runs.begin(), runs.end(), 0);
        parallel_for(tasks, run, &team);
        CHECK(std::count(runs.begin(), runs.end(), 1) == tasks);
        CHECK(static_cast<int>(members.size()) <= std::min(threads, wanted));
      }
    }
  }
  const int calls = team_calls;
  for (int wanted : {4, 1}) {  // one thread, by either's setting, is the calling one
    team_threads = wanted;
    set_num_threads(wanted == 1 ? 8 : 1);
    parallel_for(3, [](int) { CHECK(team_member < 0); }, &team);
    CHECK(team_calls == calls);
  }
  team_threads = 4;
}

void test_signals() {
  set_num_threads(2);
  const pthread_t caller = pthread_self();
  std::atomic<int> present{0};
  parallel_for(2, [&](int) {
    for (++present; present < 2;) std::this_thread::yield();
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
    const bool worker = !pthread_equal(caller, pthread_self());
    CHECK(sigismember(&blocked, SIGINT) == worker);
    CHECK(sigismember(&blocked, SIGALRM) == worker);
    CHECK(!sigismember(&blocked, SIGSEGV));
  });
}

void test_available_cpus() {
  CHECK(batchnorm::available_cpus() >= 1);
  CHECK(batchnorm::available_cpus() <= static_cast<int>(sysconf(_SC_NPROCESSORS_CONF)));
#ifdef __linux__
  std::thread([] {
    cpu_set_t allowed, one;
    CHECK(sched_getaffinity(0, sizeof allowed, &allowed) == 0);
    int cpu = 0;
    while (!CPU_ISSET(cpu, &allowed)) ++cpu;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
    CHECK(batchnorm::available_cpus() == 1);
  }).join();
#endif
}

// Runs child() in a forked process, which must end well and soon.
template <typename Child>
void in_child(const Child& child) {
  const pid_t process = fork();
  CHECK(process >= 0);
  if (process == 0) {
    alarm(30);
    child();
    _exit(0);
  }
  int status = 0;
  CHECK(waitpid(process, &status, 0) == process);
  if (WIFSIGNALED(status)) std::fprintf(stderr, "child: signal %d\n", WTERMSIG(status));
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

void use_pool_after_fork() {
  check_coverage(1000);
  rendezvous();
}

void test_fork() {
  set_num_threads(2);
  for (int round = 0; round < 20; ++round) {
    rendezvous();  // the parent's worker is awake in one round and asleep in the next
    if (round % 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    in_child([] {
      use_pool_after_fork();
      parallel_for(8, [](int) { CHECK(team_member < 0); }, &team);
      team_threads = 1;  // as its user sets it in the child
      const std::thread::id caller = std::this_thread::get_id();
      parallel_for(8, [&](int) { CHECK(std::this_thread::get_id() == caller); }, &team);
      in_child(use_pool_after_fork);
      use_pool_after_fork();
    });
    use_pool_after_fork();
  }
}

void test_fork_during_calls() {
  set_num_threads(3);
  Callers callers(4);
  for (int round = 0; round < 100; ++round) {
    in_child(use_pool_after_fork);
    check_coverage(100);
  }
}

// The process ends while its workers sleep, look for work or do it. A new program, as leak checkers
// want a clean start.
void exit_during_calls() {
  set_num_threads(3);
  for (int caller = 0; caller < 3; ++caller) {
    std::thread([] {
      for (;;) parallel_for(4, [](int) { busy(2); });
    }).detach();
  }
  check_coverage(100);
  std::exit(0);
}

void test_exit_during_calls(const char* program) {
  const int rounds = kThreadSanitizer ? 2 : 10;  // it sleeps for a second before the end
  for (int round = 0; round < rounds; ++round) {
    in_child([&] {
      CHECK(execl(program, program, "--exit-during-calls", static_cast<char*>(nullptr)) != -1);
    });
  }
}

// No room for another thread's stack: the loop is done all the same.
void test_without_threads() {
#ifdef __linux__
  in_child([] {
    long pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    const rlim_t memory = static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE)) + (1 << 20);
    const rlimit limit = {memory, memory};
    CHECK(setrlimit(RLIMIT_AS, &limit) == 0);
    set_num_threads(64);
    for (int call = 0; call < 100; ++call) check_coverage(100);
    std::atomic<int> on_caller{0};
    const pthread_t caller = pthread_self();
    parallel_for(64, [&](int) { on_caller += pthread_equal(caller, pthread_self()) != 0; });
    CHECK(on_caller == 64);
  });
#endif
}

// The median and the 99th percentile of a call, in microseconds. Between calls the caller is busy
// elsewhere for `gap` microseconds, in which workers fall asleep. It is not asleep itself: Linux
// likes to wake a worker on the very CPU on which its caller has just woken up, and such figures
// would tell about that.
template <typename Call>
void measure(const char* what, int calls, double gap, const Call& call) {
  std::vector<double> times;
  for (int i = 0; i < calls; ++i) {
    busy(gap);
    const auto start = Clock::now();
    call();
    times.push_back(microseconds(Clock::now() - start));
  }
  std::sort(times.begin(), times.end());
  std::printf("%-58s %9.2f %9.2f\n", what, times[times.size() / 2], times[times.size() * 99 / 100]);
}

void measure_latency() {
  const int threads = std::max(2, batchnorm::num_threads());
  std::printf("%d CPUs, %d threads %37s us %9s\n", batchnorm::available_cpus(), threads, "median",
              "99 %");
  const auto empty_call = [&] { parallel_for(threads, [](int) {}); };
  const auto all_present = [&] {
    std::atomic<int> present{0};
    parallel_for(threads, [&](int) {
      for (++present; present < threads;) std::this_thread::yield();
    });
  };
  set_num_threads(1);
  measure("serial, empty tasks", 100000, 0, empty_call);
  set_num_threads(threads);
  measure("hot, empty tasks", 100000, 0, empty_call);
  measure("hot, a task on every thread", 100000, 0, all_present);
  measure("idle, empty tasks", 300, 2000, empty_call);
  measure("idle, a task on every thread", 300, 2000, all_present);
  for (double work : {10, 20, 50, 100, 200, 500}) {
    char what[64];
    const auto share = [&] { parallel_for(4 * threads, [&](int) { busy(work / (4 * threads)); }); };
    std::snprintf(what, sizeof what, "hot, %3.0f us of work in %d tasks", work, 4 * threads);
    measure(what, 2000, 0, share);
    std::snprintf(what, sizeof what, "idle, %3.0f us of work in %d tasks", work, 4 * threads);
    measure(what, 200, 2000, share);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "--latency") {
    measure_latency();
    return 0;
  }
  if (mode == "--exit-during-calls") exit_during_calls();

  alarm(120);  // a deadlock ends as a failure
  CHECK(batchnorm::num_threads() == batchnorm::available_cpus());
  if (kThreadSanitizer || kAddressSanitizer) {
    std::puts("left out: a child with little memory (the sanitizer needs its own)");
  } else {
    test_without_threads();  // first, while there are no stacks of finished threads to use again
  }
  test_available_cpus();
  test_coverage();
  test_several_threads_work();
  test_shares(nullptr);
  test_unequal_tasks();
  test_nested();
  test_concurrent_callers();
  test_set_num_threads_during_calls();
  test_floating_point_environment();
  test_team();
  test_shares(&team);
  test_signals();
  if (kThreadSanitizer) {
    std::puts("left out: fork (with ThreadSanitizer a child can start no threads)");
  } else {
    test_fork();
    test_fork_during_calls();
  }
  test_exit_during_calls(argv[0]);
  std::puts("passed");
}
