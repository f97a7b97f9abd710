/* Time of flight between the points of an image and detector elements, in samples: the body of delay-and-sum, of universal
   back-projection and of their adjoint. Lengths are in samples (metres times sampling rate over speed of sound). */
#pragma once

#include "scs.h"

namespace scs {

/* What an element counts for at a point: its weight alone (delay-and-sum), or times the solid angle of its surface. */
enum Weighting { PLAIN = 0, PLANE = 1, SPACE = 2 };

/* A row of the table of elements. `towards` is the normal, which points into the image; `weight` is 0 for a dead element. */
struct Element {
    float x, y, z, towards_x, towards_y, towards_z, weight, unused;
};

/* Where in a row of `samples` numbers, with zeros around it, the sound of a point arrives: 0 stands for the zero before the
   first sample, last = samples + 1 for that after the last one; what lies further out is there, too. `early` is 1 - delay. */
template <class Real>
SCS_HD Real arrival(Real distance_squared, Real early, Real last)
{
    return least(most(square_root(distance_squared) + early, Real{}), last);
}

/* n (r - s) / |r - s|^2 in the plane, .../|r - s|^3 in space (Xu, Wang, Phys Rev E 71, 016706, 2005); 0 behind the element. */
template <int WEIGHTING, class Real>
SCS_HD Real solid_angle(Real distance_squared, Real towards, Real tiny)
{
    const Real squared = most(distance_squared, tiny), ahead = most(towards, Real{});
    return WEIGHTING == PLANE ? ahead / squared : ahead / (squared * square_root(squared));
}

}  // namespace scs
