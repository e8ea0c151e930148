// Names of what the files of a build call in one another.
#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define ENTRY(name) PASTE(name, EA_BUILD)

int ENTRY(ea_forward)(const ea_problem *p);
int ENTRY(ea_backward)(const ea_problem *p);
int ENTRY(ea_linear)(const ea_problem *p);
int ENTRY(ea_linear_backward)(const ea_problem *p);
int ENTRY(ea_step)(const ea_token *p);

// In double arithmetic, whatever the dtype.
int ENTRY(ea_forward_double)(const problem_list *list);
int ENTRY(ea_backward_double)(const problem_list *list);
int ENTRY(ea_linear_double)(const ea_problem *p);
int ENTRY(ea_linear_backward_double)(const ea_problem *p);
int ENTRY(ea_step_double)(const ea_token *p);

// One of the states of the squared form in linear time, in double arithmetic.
int ENTRY(ea_linear_state_double)(const ea_problem *p, int64_t task);
int ENTRY(ea_linear_backward_state_double)(const ea_problem *p, int64_t task);

// Row `index` of a key head, in double arithmetic, from the keys that it sees alone.
int ENTRY(ea_one_row_double)(const ea_problem *p, int64_t b, int64_t kv_head, int64_t index);
