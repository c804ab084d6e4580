// probes list | all | NAME | NAME broken | NAME healthy
#include <string_view>

#include "probe.h"

int main(int count, char** arguments) {
  const std::string_view name = count > 1 ? arguments[1] : "list";
  const bool broken = count > 2 && std::string_view(arguments[2]) == "broken";
  bool found = false;
  for (const probes::Probe& probe : probes::all_probes()) {
    if (name == "list") std::printf("%s %s\n", probe.fault ? "fault" : "probe", probe.name);
    if (name != probe.name && !(name == "all" && !probe.fault)) continue;
    found = true;
    probe.run(broken);
    std::printf("right: %s\n", probe.name);
  }
  return found || name == "list" ? 0 : 2;
}
